#include "rollout/node_bridge/node_bridge.h"

#include <memory>
#include <utility>
#include <variant>

#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/node_bridge/sample_frame.h"
#include "rollout/node_bridge/server_options.h"

namespace rollpack::rollout {
namespace {

// What has come is told in pieces of so much, a small part of what may be under way.
constexpr size_t kReceivedBytesAtOnce = size_t{1} << 20;

}  // namespace

NodeBridge::NodeBridge(const Config& config, int32_t pad_token_id, const Place& place,
                       std::function<void(std::vector<uint8_t>)> send)
    : rank_(place.rank),
      send_(std::move(send)),
      service_([this](const NodeRequest& request) { this->send(request); }, place.weights_place),
      server_(server_options(config, pad_token_id)),
      store_(server_),
      inlet_(place.job, place.rank, store_) {}

NodeBridge::~NodeBridge() {
  stop();
}

// Errors: those of encode(), here; a link that breaks is reported where it is read.
void NodeBridge::send(const NodeRequest& request) {
  bridge::asio::post(sender_, [this, frame = encode(request)]() mutable {
    try {
      send_(std::move(frame));
    } catch (const Error&) {
    }
  });
}

void NodeBridge::handle(std::vector<uint8_t> frame) {
  if (!is_sample_frame(frame)) {
    NodeNews news = decode_node_news(frame);
    return std::visit([this](auto& known) { on_news(known); }, news);
  }
  num_bytes_received_ += frame.size();
  server_.commit(std::move(decode_sample_frame(std::move(frame)).sample));
  if (num_bytes_received_ < kReceivedBytesAtOnce) return;
  send(asked::Received{std::exchange(num_bytes_received_, 0)});
}

void NodeBridge::keep(int32_t attempt, bridge::Sample sample) {
  store_.keep(rank_, attempt, std::move(sample));
}

void NodeBridge::on_news(told::Open& news) {
  if (news.restored) server_.keep_log(service_, std::move(*news.restored));
  service_.open(std::move(news));
  server_.start(service_);
  spdlog::info("serving this node's trainers");
  send(asked::Opened{});
}

void NodeBridge::on_news(told::State& news) {
  service_.update(std::move(news));
  server_.health_changed();
}

void NodeBridge::on_news(told::Stats& news) {
  news.values.emplace_back("num_samples_kept", static_cast<double>(store_.num_samples()));
  news.values.emplace_back("num_kept_samples_dropped", static_cast<double>(store_.num_dropped()));
  service_.answer(std::move(news));
}

// Answered by the thread that serves clients: what it does is what counts.
void NodeBridge::on_news(told::Ping&) {
  server_.ask_numbers([this](const bridge::ServerNumbers&) { send(asked::Present{}); });
}

void NodeBridge::stop(const bridge::Outcome& error) {
  if (error) {
    service_.lose(*error);
    server_.health_changed();
  }
  server_.stop();
}

}  // namespace rollpack::rollout
