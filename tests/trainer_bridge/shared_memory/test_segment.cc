// Seals as peers meet them: a process that holds the descriptor tries every way to change a segment
// of ours, and every kind of descriptor that a peer may send us is tried on MappedSegment.
#include "trainer_bridge/shared_memory/segment.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "tests/trainer_bridge/shared_memory/peer_file.h"

namespace rollpack::bridge {
namespace {

using rollpack::testing::error_text;
using testing::PeerFile;

constexpr int64_t kBytes = 3 * 4096 + 100;

// Runs `body` in a forked process and returns its result as that process's exit status.
int in_peer(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(60);
    ::_exit(body());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status)) << "status " << status;
  return WEXITSTATUS(status);
}

// 0 where every attempt to change the segment is refused with EPERM, else the attempt's number.
int first_attempt_that_works(int fd) {
  char byte = 'x';
  const auto is_refused = [](int64_t result) { return result < 0 && errno == EPERM; };
  if (!is_refused(::pwrite(fd, &byte, 1, 0))) return 1;
  if (!is_refused(::ftruncate(fd, kBytes - 1))) return 2;
  if (!is_refused(::ftruncate(fd, kBytes + 1))) return 3;
  if (!is_refused(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096))) return 4;
  if (!is_refused(::fallocate(fd, 0, 0, kBytes + 4096))) return 5;
  if (::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED) return 6;
  if (errno != EPERM) return 7;
  if (!is_refused(::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE))) return 8;
  const PeerFile again(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR));
  if (again.fd() >= 0 && !is_refused(::pwrite(again.fd(), &byte, 1, 0))) return 9;
  return 0;
}

TEST(SealedSegment, APeerCanNeitherWriteNorPunchNorShrinkNorGrowIt) {
  SealedSegment segment = SealedSegment::create("test", kBytes);
  std::fill(segment.bytes().begin(), segment.bytes().end(), std::byte{7});
  EXPECT_EQ(in_peer([&] { return first_attempt_that_works(segment.fd()); }), 0);
  for (const std::byte byte : segment.bytes()) ASSERT_EQ(byte, std::byte{7});
}

TEST(SealedSegment, TheOwnerStillWritesAndAPeerSeesIt) {
  SealedSegment segment = SealedSegment::create("test", kBytes);
  segment.bytes()[4096] = std::byte{41};
  const int seen = in_peer([&] {
    void* map = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, segment.fd(), 0);
    return map == MAP_FAILED ? 255 : std::to_integer<int>(static_cast<std::byte*>(map)[4096]);
  });
  EXPECT_EQ(seen, 41);
}

TEST(SealedSegment, APeersPrivateWritesStayItsOwn) {
  SealedSegment segment = SealedSegment::create("test", kBytes);
  const int wrote = in_peer([&] {
    void* map = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, segment.fd(), 0);
    if (map == MAP_FAILED) return 1;
    std::memset(map, 9, kBytes);
    return 0;
  });
  EXPECT_EQ(wrote, 0);
  for (const std::byte byte : segment.bytes()) ASSERT_EQ(byte, std::byte{0});
}

TEST(SealedSegment, StartsAllocatedZeroSealedAndCloseOnExec) {
  const SealedSegment segment = SealedSegment::create("test", kBytes);
  EXPECT_EQ(segment.bytes().size(), static_cast<size_t>(kBytes));
  struct stat status {};
  ASSERT_EQ(::fstat(segment.fd(), &status), 0);
  EXPECT_EQ(status.st_size, kBytes);
  EXPECT_GE(status.st_blocks * 512, 4 * 4096);  // before a touch could add pages
  for (const std::byte byte : segment.bytes()) ASSERT_EQ(byte, std::byte{0});
  EXPECT_EQ(::fcntl(segment.fd(), F_GET_SEALS) & kOwnerSeals, kOwnerSeals);
  EXPECT_EQ(::fcntl(segment.fd(), F_GETFD), FD_CLOEXEC);
}

// The VmFlags of the map at `address`, as /proc/self/smaps lists them.
std::string map_flags(const void* address) {
  char start[32];
  std::snprintf(start, sizeof start, "%lx-", reinterpret_cast<unsigned long>(address));
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  bool is_found = false;
  while (std::getline(smaps, line)) {
    is_found = is_found || line.rfind(start, 0) == 0;
    if (is_found && line.rfind("VmFlags:", 0) == 0) return line + " ";
  }
  return "not found";
}

TEST(SealedSegment, IsLeftOutOfCoreDumps) {
  const SealedSegment segment = SealedSegment::create("test", kBytes);
  const std::string flags = map_flags(segment.bytes().data());
  EXPECT_NE(flags.find(" dd "), std::string::npos) << flags;
}

int64_t num_open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return std::distance(begin(files), end(files));
}

TEST(SealedSegment, MovesWithoutLeakingDescriptors) {
  const int64_t before = num_open_files();
  {
    SealedSegment first = SealedSegment::create("first", 4096);
    SealedSegment second = SealedSegment::create("second", 8192);
    const int fd = second.fd();
    first = std::move(second);
    EXPECT_EQ(first.fd(), fd);
    EXPECT_EQ(first.bytes().size(), 8192u);
    SealedSegment third = std::move(first);
    third.bytes()[8191] = std::byte{1};
    EXPECT_EQ(third.fd(), fd);
  }
  EXPECT_EQ(num_open_files(), before);
}

// Sets a soft resource limit and restores it.
class LoweredLimit {
 public:
  LoweredLimit(__rlimit_resource resource, rlim_t value) : resource_(resource) {
    EXPECT_EQ(::getrlimit(resource, &before_), 0);
    rlimit lowered = before_;
    lowered.rlim_cur = value;
    EXPECT_EQ(::setrlimit(resource, &lowered), 0);
  }
  ~LoweredLimit() { EXPECT_EQ(::setrlimit(resource_, &before_), 0); }
  LoweredLimit(const LoweredLimit&) = delete;
  LoweredLimit& operator=(const LoweredLimit&) = delete;

 private:
  __rlimit_resource resource_;
  rlimit before_{};
};

TEST(SealedSegment, FileSizeLimitErrorNamesUlimit) {
  const auto error = [] {
    const LoweredLimit limit(RLIMIT_FSIZE, 1 << 20);
    return error_text([] { SealedSegment::create("slot", 2 << 20); });
  }();
  EXPECT_EQ(error,
            "resource_exhausted: memfd slot = 2097152 bytes: expected 1048576 bytes, the limit on "
            "file sizes; it holds for shared memory too; raise it with ulimit -f");
}

TEST(SealedSegment, DescriptorLimitErrorNamesTheCall) {
  const int64_t before = num_open_files();
  const auto error = [] {
    const LoweredLimit limit(RLIMIT_NOFILE, 0);
    return error_text([] { SealedSegment::create("slot", 4096); });
  }();
  EXPECT_EQ(error,
            "resource_exhausted: memfd slot = 4096 bytes: memfd_create: Too many open files");
  EXPECT_EQ(num_open_files(), before);
}

TEST(SealedSegment, MoreThanTheMemoryThereIsIsRefusedBeforeItIsTaken) {
  const std::string error = error_text([] { SealedSegment::create("slot", int64_t{1} << 50); });
  EXPECT_EQ(error.rfind("resource_exhausted: memfd slot = 1125899906842624 bytes: expected ", 0),
            0u)
      << error;
  EXPECT_NE(error.find(" bytes, the memory available now"), std::string::npos) << error;
}

TEST(SealedSegment, NoBytesAreAnError) {
  EXPECT_EQ(error_text([] { SealedSegment::create("slot", 0); }),
            "invalid_argument: memfd slot = 0 bytes: expected 1 or more");
}

// What a peer would send: a memfd with `bytes` bytes of 5, then sealed.
int make_peer_memfd(int64_t bytes, int seals) {
  const int fd = ::memfd_create("peer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  const std::string content(static_cast<size_t>(bytes), '\5');
  EXPECT_EQ(::pwrite(fd, content.data(), content.size(), 0), bytes);
  EXPECT_EQ(::fcntl(fd, F_ADD_SEALS, seals), 0);
  return fd;
}

std::string map_error(int fd, int64_t bytes = kBytes) {
  return error_text([&] { MappedSegment::map(fd, bytes, kPeerSeals, "chunk 3 of client 1"); });
}

TEST(MappedSegment, ReadsASealedMemfdAndOutlivesItsDescriptor) {
  const auto map_and_close = [] {
    const PeerFile peer(make_peer_memfd(kBytes, kPeerSeals));
    return MappedSegment::map(peer.fd(), kBytes - 1, kPeerSeals, "client 1");
  };
  MappedSegment first = map_and_close();
  MappedSegment segment = std::move(first);
  ASSERT_EQ(segment.bytes().size(), static_cast<size_t>(kBytes - 1));
  for (const std::byte byte : segment.bytes()) ASSERT_EQ(byte, std::byte{5});
  segment = map_and_close();
  EXPECT_EQ(segment.bytes().back(), std::byte{5});
}

TEST(MappedSegment, ReadsASegmentOfOursUnderItsOwnSeals) {
  SealedSegment owned = SealedSegment::create("test", kBytes);
  const MappedSegment mapped = MappedSegment::map(owned.fd(), kBytes, kOwnerSeals, "rank 0");
  owned.bytes()[77] = std::byte{3};
  EXPECT_EQ(mapped.bytes()[77], std::byte{3});
}

TEST(MappedSegment, MissingSealsAreNamed) {
  const std::string expected =
      " (chunk 3 of client 1): expected F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE; bytes that may "
      "still change or go are not read";
  const PeerFile none(make_peer_memfd(kBytes, 0));
  EXPECT_EQ(map_error(none.fd()), "data_loss: seals = no seals" + expected);
  const PeerFile no_shrink(make_peer_memfd(kBytes, F_SEAL_GROW | F_SEAL_WRITE));
  EXPECT_EQ(map_error(no_shrink.fd()), "data_loss: seals = F_SEAL_GROW | F_SEAL_WRITE" + expected);
  const PeerFile no_write(make_peer_memfd(kBytes, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_EQ(map_error(no_write.fd()), "data_loss: seals = F_SEAL_SHRINK | F_SEAL_GROW" + expected);
  const PeerFile unsealable(::memfd_create("peer", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(unsealable.fd(), kBytes), 0);
  EXPECT_EQ(map_error(unsealable.fd()), "data_loss: seals = F_SEAL_SEAL" + expected);
}

TEST(MappedSegment, ASizeBelowTheManifestsIsNamed) {
  const PeerFile peer(make_peer_memfd(kBytes, kPeerSeals));
  EXPECT_EQ(map_error(peer.fd(), kBytes + 1),
            "data_loss: memfd size = 12388 bytes (chunk 3 of client 1): expected 12389 bytes or "
            "more");
  EXPECT_EQ(map_error(peer.fd(), 0),
            "invalid_argument: segment of chunk 3 of client 1 = 0 bytes: expected 1 or more");
}

// Huge pages that a peer promised and the system does not have would be a SIGBUS on first touch;
// the map takes them at once, or fails.
TEST(MappedSegment, AHugePageMemfdIsMappedWholeOrRefused) {
  constexpr int64_t kHugeBytes = int64_t{2} << 20;
  const PeerFile peer(::memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB));
  if (peer.fd() < 0) return;  // then no peer can send one either
  ASSERT_EQ(::ftruncate(peer.fd(), kHugeBytes), 0);
  ASSERT_EQ(::fcntl(peer.fd(), F_ADD_SEALS, kPeerSeals), 0);
  const std::string error = map_error(peer.fd(), kHugeBytes);
  if (error == "no error") {
    const auto mapped = MappedSegment::map(peer.fd(), kHugeBytes, kPeerSeals, "peer");
    EXPECT_EQ(mapped.bytes().back(), std::byte{0});
  } else {
    EXPECT_EQ(error.rfind("resource_exhausted: ", 0), 0u) << error;
  }
}

// Descriptors that are no memfd; the number is the test's, so it is taken out of the text.
std::string kind_error(int fd) {
  return rollpack::testing::with_replaced(map_error(fd), "= " + std::to_string(fd) + " ", "= FD ");
}

TEST(MappedSegment, PipesSocketsAndFilesAreRefused) {
  const std::string expected =
      "invalid_argument: descriptor = FD (chunk 3 of client 1): expected a sealed memfd; "
      "F_GET_SEALS: ";
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const PeerFile pipe_out(ends[0]), pipe_in(ends[1]);
  EXPECT_EQ(kind_error(pipe_out.fd()), expected + "Invalid argument");
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  const PeerFile one(ends[0]), other(ends[1]);
  EXPECT_EQ(kind_error(one.fd()), expected + "Invalid argument");
  const PeerFile device(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  EXPECT_EQ(kind_error(device.fd()), expected + "Invalid argument");
  EXPECT_EQ(kind_error(-1), expected + "Bad file descriptor");
}

TEST(MappedSegment, AFileOnDiskOrInDevShmIsRefused) {
  for (const char* folder : {"/var/tmp", "/dev/shm"}) {
    std::string path = std::string(folder) + "/rollpack-test-XXXXXX";
    const PeerFile file(::mkostemp(path.data(), O_CLOEXEC));
    ASSERT_GE(file.fd(), 0) << path;
    ::unlink(path.c_str());
    ASSERT_EQ(::ftruncate(file.fd(), kBytes), 0);
    // A file system without seals says so; tmpfs answers F_SEAL_SEAL, which is not enough.
    const std::string error = kind_error(file.fd());
    EXPECT_TRUE(error.find("F_GET_SEALS: Invalid argument") != std::string::npos ||
                error.rfind("data_loss: seals = F_SEAL_SEAL (", 0) == 0)
        << error;
  }
}

TEST(OpenSegment, IsWrittenInPiecesAndThenByNobody) {
  OpenSegment segment = OpenSegment::create("test", kBytes);
  std::vector<std::byte> bytes(kBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 13);
  segment.write(0, std::span(bytes).first(1));
  segment.write(1, std::span(bytes).subspan(1, 4096));
  segment.write(4097, std::span(bytes).subspan(4097));
  EXPECT_NE(error_text([&] { segment.write(kBytes, std::span(bytes).first(1)); }), "no error");
  EXPECT_NE(error_text([&] { segment.write(-1, std::span(bytes).first(1)); }), "no error");
  EXPECT_NE(error_text([&] { MappedSegment::map(segment.fd(), kBytes, kPeerSeals, "test"); }),
            "no error")
      << "it may still change";
  segment.seal();
  EXPECT_NE(error_text([&] { segment.write(0, std::span(bytes).first(1)); }), "no error");
  EXPECT_EQ(in_peer([&] { return first_attempt_that_works(segment.fd()); }), 0);
  const MappedSegment map = MappedSegment::map(segment.fd(), kBytes, kPeerSeals, "test");
  EXPECT_TRUE(std::ranges::equal(map.bytes(), bytes));
}

}  // namespace
}  // namespace rollpack::bridge
