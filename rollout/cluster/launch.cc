#include "rollout/cluster/launch.h"

#include <mpi.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>
#include <string_view>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "rollout/event_log/event_log.h"

namespace rollpack::rollout {
namespace {

// Ranks meet before they load anything; two minutes is for a machine with no core to spare.
constexpr std::chrono::seconds kMeetingLimit{120};
constexpr int kNoMeetingStatus = 3;
constexpr int kFailureTag = 1;  // of the empty message by which a rank says that it cannot connect

// Dies with `parent`, mpirun or rank 0, also when that is killed without a chance to clean up.
void die_with(pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) std::_Exit(1);  // it died before prctl took hold
}

bool is_under_mpirun() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

// Open MPI keeps a 4 MiB file a rank in /dev/shm, and leaves it there when it is killed. Ours lie
// in a folder of the job that goes as soon as the ranks have met.
std::filesystem::path mpi_folder() {
  const char* job = std::getenv("PMIX_NAMESPACE");
  const char* base = std::getenv("TMPDIR");
  return std::filesystem::path(base != nullptr ? base : "/tmp") /
         fmt::format("rollpack-mpi-{}-{}", ::getuid(), job != nullptr ? job : "job");
}

// mpirun may bind ranks to CPUs of their own, to a node's, or not at all: each learns all masks of
// its host.
kernels::CpuSharing sharing_of_cpus(MPI_Comm host, int num_ranks_on_host) {
  std::vector<char> mine(kernels::kMaxCpus);
  for (const int cpu : kernels::affinity_cpus()) mine[static_cast<size_t>(cpu)] = 1;
  std::vector<char> all(mine.size() * static_cast<size_t>(num_ranks_on_host));
  MPI_Allgather(mine.data(), kernels::kMaxCpus, MPI_CHAR, all.data(), kernels::kMaxCpus, MPI_CHAR,
                host);
  std::vector<std::vector<int>> masks(static_cast<size_t>(num_ranks_on_host));
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i] != 0) masks[i / mine.size()].push_back(static_cast<int>(i % mine.size()));
  }
  int own = 0;
  MPI_Comm_rank(host, &own);
  return kernels::sharing_of(masks, own);
}

Placement find_placement() {
  Placement placement;
  MPI_Comm_rank(MPI_COMM_WORLD, &placement.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &placement.num_ranks);
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_size(host, &placement.num_ranks_on_node);
  MPI_Comm_rank(host, &placement.rank_on_node);
  placement.cpus = sharing_of_cpus(host, placement.num_ranks_on_node);
  int first = placement.rank;  // of the host's ranks
  MPI_Bcast(&first, 1, MPI_INT, 0, host);
  MPI_Comm_free(&host);
  std::vector<int> firsts(static_cast<size_t>(placement.num_ranks));
  MPI_Allgather(&first, 1, MPI_INT, firsts.data(), 1, MPI_INT, MPI_COMM_WORLD);
  std::map<int, int> nodes;  // by first rank
  placement.node_of_rank.clear();
  for (const int each : firsts) {
    placement.node_of_rank.push_back(
        nodes.emplace(each, static_cast<int>(nodes.size())).first->second);
  }
  return placement;
}

// Texts of all ranks, on rank 0.
std::vector<std::string> gather_texts(const std::string& text, int num_ranks) {
  const int length = static_cast<int>(text.size());
  std::vector<int> lengths(static_cast<size_t>(num_ranks)), starts(lengths.size());
  MPI_Gather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, 0, MPI_COMM_WORLD);
  std::exclusive_scan(lengths.begin(), lengths.end(), starts.begin(), 0);
  std::string all(static_cast<size_t>(starts.back() + lengths.back()), '\0');
  MPI_Gatherv(text.data(), length, MPI_CHAR, all.data(), lengths.data(), starts.data(), MPI_CHAR, 0,
              MPI_COMM_WORLD);
  std::vector<std::string> texts;
  for (size_t i = 0; i < lengths.size(); ++i) {
    texts.push_back(all.substr(static_cast<size_t>(starts[i]), static_cast<size_t>(lengths[i])));
  }
  return texts;
}

// With recovery mpirun never learns how ranks of a host that is gone have ended, and stays. Told to
// end it waits for that host too; told so thrice within 5 s it goes. It may take this process
// along, which has nothing left to do.
void end_launcher() {
  const pid_t parent = ::getppid();
  std::string name;
  std::ifstream(fmt::format("/proc/{}/comm", parent)) >> name;
  if (name != "mpirun" && name != "orterun" && name != "mpiexec") return;
  for (int i = 0; i < 8 && ::getppid() == parent; ++i) {
    ::kill(parent, SIGTERM);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

// Appears whole, so that nobody reads half a number.
void write_status(const std::string& text) {
  const char* path = std::getenv("ROLLPACK_STATUS_FILE");
  if (path == nullptr || *path == '\0') return;
  const std::string temporary = std::string(path) + ".new";
  std::ofstream(temporary) << text << "\n";
  std::error_code ignored;  // a full disk is no reason not to end
  std::filesystem::rename(temporary, path, ignored);
}

}  // namespace

// MPI waits for ever for a rank that has died: whoever waits past the limit leaves.
class MeetingLimit {
 public:
  explicit MeetingLimit(int rank) : thread_([this, rank] { watch(rank); }) {}
  ~MeetingLimit() {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    over_.notify_one();
    thread_.join();
  }

 private:
  void watch(int rank) {
    std::unique_lock lock(mutex_);
    if (over_.wait_for(lock, kMeetingLimit, [&] { return is_over_; })) return;
    log_end({.code = ErrorCode::kDeadlineExceeded,
             .field = fmt::format("rank {}", rank),
             .message = fmt::format("ranks did not meet in {} s", kMeetingLimit.count())});
    std::fflush(nullptr);
    if (rank == 0) write_status(std::to_string(kNoMeetingStatus));
    std::_Exit(kNoMeetingStatus);
  }

  std::mutex mutex_;
  std::condition_variable over_;
  bool is_over_ = false;
  std::thread thread_;
};

Launch::~Launch() = default;

Launch::Launch(int* argc, char*** argv) : join_order_(rollout::join_order()) {
  if (join_order_) {
    // It inherits rank 0's CPUs, and computes in the stead of a rank that shared them.
    const int num_ranks = join_order_->num_ranks;
    placement_ = {.rank = join_order_->rank,
                  .num_ranks = num_ranks,
                  .num_ranks_on_node = num_ranks,
                  .rank_on_node = join_order_->rank_on_node,
                  .node_of_rank = std::vector<int>(static_cast<size_t>(join_order_->rank) + 1),
                  .cpus = {.num_processes = num_ranks, .index = join_order_->rank_on_node}};
    die_with(join_order_->parent);
    return;
  }
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  const int expected_rank = rank == nullptr ? 0 : std::atoi(rank);
  if (expected_rank == 0) write_status("running");
  if (!is_under_mpirun()) return;
  die_with(::getppid());
  limit_ = std::make_unique<MeetingLimit>(expected_rank);
  mpi_folder_ = mpi_folder();
  std::error_code
      ignored;  // another rank may have made it; MPI_Init reports a folder it cannot use
  std::filesystem::create_directories(mpi_folder_, ignored);
  ::chmod(mpi_folder_.c_str(), 0700);
  ::setenv("OMPI_MCA_btl_vader_backing_directory", mpi_folder_.c_str(), /*overwrite=*/1);
  int provided = 0;
  MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  has_mpi_ = true;
  placement_ = find_placement();
}

std::vector<int> Placement::first_ranks() const {
  std::vector<int> firsts;
  for (size_t each = 0; each < node_of_rank.size(); ++each) {
    // Nodes are numbered by their first ranks.
    if (node_of_rank[each] == static_cast<int>(firsts.size())) {
      firsts.push_back(static_cast<int>(each));
    }
  }
  return firsts;
}

int Placement::num_nodes() const {
  return *std::ranges::max_element(node_of_rank) + 1;
}

int Placement::most_ranks_on_a_node() const {
  std::vector<int> counts(static_cast<size_t>(num_nodes()));
  for (const int node : node_of_rank) ++counts[static_cast<size_t>(node)];
  return *std::ranges::max_element(counts);
}

std::string Launch::meet(const std::string& text,
                         const std::function<void(const std::string&)>& connect) {
  std::string received = join_order_ ? join_order_->line : text;
  if (!has_mpi_) {
    if (connect) connect(received);
    return received;
  }
  int length = static_cast<int>(text.size());
  MPI_Bcast(&length, 1, MPI_INT, 0, MPI_COMM_WORLD);
  received.resize(static_cast<size_t>(length));
  MPI_Bcast(received.data(), length, MPI_CHAR, 0, MPI_COMM_WORLD);
  std::exception_ptr failure;
  std::vector<std::string> reasons;
  if (length > 0) {  // not called off
    std::string reason;
    try {
      if (connect) connect(received);
    } catch (const Error& error) {
      failure = std::current_exception();
      reason = error.what();
    }
    // Rank 0 need not wait for this one.
    if (failure && placement_.rank > 0) {
      MPI_Send(nullptr, 0, MPI_CHAR, 0, kFailureTag, MPI_COMM_WORLD);
    }
    reasons = gather_texts(reason, placement_.num_ranks);
    for (size_t rank = 1; placement_.rank == 0 && rank < reasons.size(); ++rank) {
      if (reasons[rank].empty()) continue;
      MPI_Recv(nullptr, 0, MPI_CHAR, static_cast<int>(rank), kFailureTag, MPI_COMM_WORLD,
               MPI_STATUS_IGNORE);
    }
  }
  MPI_Finalize();
  has_mpi_ = false;
  limit_.reset();
  std::error_code ignored;
  std::filesystem::remove(mpi_folder_, ignored);  // the last rank finds it empty
  std::erase(reasons, "");
  if (placement_.rank == 0 && !reasons.empty()) {
    throw Error(
        {.code = ErrorCode::kUnavailable,
         .field = "ranks",
         .value = fmt::format("{} of {} could not connect", reasons.size(), placement_.num_ranks),
         .message = fmt::format("{}", fmt::join(reasons, "; "))});
  }
  if (failure) std::rethrow_exception(failure);
  return received;
}

bool Launch::has_heard_of_failure() const {
  int has_come = 0;
  if (has_mpi_) {
    MPI_Iprobe(MPI_ANY_SOURCE, kFailureTag, MPI_COMM_WORLD, &has_come, MPI_STATUS_IGNORE);
  }
  return has_come != 0;
}

void Launch::call_off() {
  if (has_mpi_ && placement_.rank == 0) meet("");
}

bool Launch::survives_deaths() const {
  const char* setting = std::getenv("OMPI_MCA_orte_enable_recovery");
  return setting != nullptr && std::string_view(setting) != "0";
}

void Launch::exit(int status) const {
  std::fflush(nullptr);
  if (placement_.rank == 0) write_status(std::to_string(status));
  if (placement_.rank == 0 && has_lost_host_) end_launcher();
  std::_Exit(status);
}

}  // namespace rollpack::rollout
