#include "tests/rollout/cluster/simulated_trainer.h"

#include <fmt/format.h>

#include "tests/trainer_bridge/layout/batch_reader.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout::simulation {
namespace {

constexpr int32_t kNumSlots = 4;
constexpr int64_t kSlotBytes = 16384;

std::string text_of(const SampleName& name) {
  return fmt::format("sample {} of prompt {} of request {}", std::get<2>(name), std::get<1>(name),
                     std::get<0>(name));
}

SampleName name_of(const bridge::SampleKey& key) {
  return {key.request_id, key.prompt_index, key.sample_index};
}

}  // namespace

Life::Life(World& world, const std::shared_ptr<testing::Disk>& disk)
    : journal(world, disk),
      layout(bridge::make_layout({})),
      slots(kNumSlots, kSlotBytes),
      delivery(slots, *layout) {
  delivery.configure({.attention_parity_tokens = 100});
  delivery.restore(journal, journal.log().restored_delivery());
}

void SimulatedTrainer::connect(Life& life) {
  life_ = &life;
  for (Client& client : clients_) connect(client);
}

void SimulatedTrainer::connect(Client& client) {
  client.number = ++num_clients_;
  client.held.clear();
  if (clients_.size() == 1) return;
  life_->delivery.join(client.number, {.rank = static_cast<int32_t>(&client - clients_.data()),
                                       .size = static_cast<int32_t>(clients_.size())});
}

// It may live on, with the memory of the slots it had, and consume what it holds.
void SimulatedTrainer::lose_job() {
  for (Client& client : clients_) {
    client.number = 0;
    while (!client.held.empty()) {
      world_.dice.chance(0.3) ? consume(client, 0) : void(client.held.erase(client.held.begin()));
    }
  }
  life_ = nullptr;
}

size_t SimulatedTrainer::num_held() const {
  size_t count = 0;
  for (const Client& client : clients_) count += client.held.size();
  return count;
}

void SimulatedTrainer::turn() {
  Dice& dice = world_.dice;
  for (Client& client : clients_) {
    if (dice.chance(world_.fault_rate / 2)) {
      world_.fault(Fault::kClientDeath);
      life_->delivery.client_gone(client.number, bridge::GoneClient::kKeepMemory);
      connect(client);
    }
    if (client.held.size() < 2 && dice.chance(0.5)) ask(client);
    if (!client.held.empty() && dice.chance(0.4)) {
      consume(client, static_cast<size_t>(dice.below(static_cast<int64_t>(client.held.size()))));
    }
  }
}

void SimulatedTrainer::ask(Client& client) {
  bridge::BatchWish wish;
  if (world_.dice.chance(0.5)) {
    wish.num_groups = world_.dice.between(1, 4);
    wish.min_ready = 1;
  }
  const auto notice = life_->delivery.next_batch(client.number, wish);
  if (!notice) return;
  life_->journal.when_durable([this, number = client.number, notice = *notice](
                                  const bridge::Outcome&) { receive(number, notice); });
}

void SimulatedTrainer::receive(uint64_t number, const bridge::BatchNotice& notice) {
  const auto client = std::ranges::find(clients_, number, &Client::number);
  if (client == clients_.end()) return;  // it has died meanwhile
  compare(notice);
  if (consumed_.contains(notice.batch_seq)) {
    world_.fault(Fault::kPassedOver);
    return give_back(*client, notice);
  }
  client->held.push_back(notice);
}

SimulatedTrainer::Seen SimulatedTrainer::look(const bridge::BatchNotice& notice) {
  Seen seen;
  for (const bridge::FailedSample& failed : notice.failed) seen.names.insert(name_of(failed.key));
  if (!notice.lease) return seen;
  const auto mapped = bridge::MappedSegment::map(life_->slots.fd(notice.lease->slot), notice.bytes,
                                                 bridge::kOwnerSeals, "simulation");
  const auto batch = bridge::testing::read_batch(mapped.bytes());
  const auto requests = batch.values<int64_t>("request_id");
  const auto prompts = batch.values<int32_t>("prompt_index");
  const auto samples = batch.values<int32_t>("sample_index");
  const auto reasons = batch.values<uint8_t>("finish_reason");
  const auto ids = batch.values<int32_t>("input_ids");
  const auto versions = batch.values<int32_t>("weight_versions");
  const auto starts = batch.values<int32_t>("cu_seqlens");
  for (size_t i = 0; i < requests.size(); ++i) {
    const SampleName name{requests[i], prompts[i], samples[i]};
    const auto first = ids.begin() + starts[i], last = ids.begin() + starts[i + 1];
    world_.check(seen.names.insert(name).second, text_of(name) + " is twice in a batch");
    seen.samples[name] = {
        versions[static_cast<size_t>(starts[i + 1] - 1)], reasons[i] == 2, {first, last}};
  }
  return seen;
}

// A batch that has come before holds what it held then, where the weights are those of then.
void SimulatedTrainer::compare(const bridge::BatchNotice& notice) {
  const Seen now = look(notice);
  const auto [before, is_new] = seen_.try_emplace(notice.batch_seq, now);
  if (!is_new) {
    world_.fault(Fault::kRedelivery);
    world_.check(before->second.names == now.names,
                 fmt::format("batch {} holds other samples than before", notice.batch_seq));
    for (const auto& [name, sample] : now.samples) {
      const auto same = before->second.samples.find(name);
      if (same == before->second.samples.end()) continue;  // it failed then
      const auto& [version, was_aborted, tokens] = same->second;
      // Under other weights too: a sample of the simulation ends by length or by an abort.
      world_.check(
          was_aborted == std::get<1>(sample) && tokens.size() == std::get<2>(sample).size(),
          text_of(name) + " ends elsewhere than before");
      const bool is_of_same_weights = version == std::get<0>(sample);
      world_.check(!is_of_same_weights || same->second == sample,
                   text_of(name) + " is not what it was");
    }
  }
}

void SimulatedTrainer::consume(Client& client, size_t index) {
  const bridge::BatchNotice notice = client.held[index];
  client.held.erase(client.held.begin() + static_cast<int64_t>(index));
  for (const SampleName& name : seen_.at(notice.batch_seq).names) {
    world_.check(ended_.insert(name).second, text_of(name) + " was consumed twice");
  }
  consumed_.insert(notice.batch_seq);
  give_back(client, notice);
}

void SimulatedTrainer::give_back(const Client& client, const bridge::BatchNotice& notice) {
  if (client.number == 0) return;
  life_->delivery.release(client.number, notice.lease, notice.batch_seq);
  life_->journal.when_durable([this, seq = notice.batch_seq](const bridge::Outcome&) {
    consumed_.erase(seq);
    released_.insert(seen_[seq].names.begin(), seen_[seq].names.end());
  });
}

}  // namespace rollpack::rollout::simulation
