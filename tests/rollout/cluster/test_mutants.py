"""Would the simulation notice? Bugs seeded into the dispatcher and the ledger, one at a time.

Each mutant is one replacement in one file, compiled as the build compiles that file and linked in
front of the library it comes from. Minutes of compiling: with ROLLPACK_FULL=1 only.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUILD = pathlib.Path(os.environ.get("ROLLPACK_BUILD_DIR", ROOT / "build"))
TARGET = "tests/rollout/test_rollout_simulation"
NUM_SEEDS = 4000

# What the bug is, where (a file of rollout/cluster, or a path), and the text that becomes another.
MUTANTS = [
    ("a fenced attempt counts", "ledger", "found->second.worker == worker &&\n"
     "                      found->second.attempt == attempt && ", ""),
    ("a second sample counts", "ledger", "!found->second.is_done[key.sample_index]", "true"),
    ("a lost worker's groups are forgotten", "ledger", "      enqueue(it->first, entry);\n", ""),
    ("what was aborted before a loss is forgotten", "dispatcher_recovery",
     "for (const GroupRequest& request : fenced.aborted) commit_empty(request, effects);", ""),
    ("culprits end without an error", "dispatcher_recovery",
     "    fail_open(request, culprit_error(request, error), effects);\n", ""),
    ("a lost worker still asks for work", "dispatcher_recovery",
     "  askers_.erase({state.num_outstanding, worker});\n  state.is_stopped", "  state.is_stopped"),
    ("leases never run out", "dispatcher_recovery", "if (was_stopped) state.last_progress = now;",
     "state.last_progress = now;"),
    ("a stopped rank 0 expires everybody", "dispatcher_recovery",
     "if (was_stopped) state.last_progress = now;", ""),
    ("nobody answers for a lost worker", "dispatcher_recovery",
     "    give_up_ticket(ticket, error, effects);\n", ""),
    ("a lost worker's scores are not asked again", "dispatcher_recovery",
     "if (is_tried_again) return send_score(batch, index);", "if (is_tried_again) return;"),
    ("a lost worker stays reserved for suspects", "dispatcher_recovery",
     "if (quarantine_ == worker) quarantine_.reset();", ""),
    ("a replacement takes part at once", "dispatcher_joining", ".is_joining = true,", ""),
    ("a replacement joins under old weights", "dispatcher_joining",
     "if (version != weights_.version || update_version_ || needs_weights_) {", "if (false) {"),
    ("who joins is given weights that were dropped", "dispatcher_joining", " || needs_weights_;",
     ";"),
    ("calls of sleep do not follow one another", "dispatcher_sleep",
     "    if (!sleep_calls_.empty()) begin_sleep_call(effects);\n  }", "  }"),
    ("partial updates are kept without what they rest on", "kept_weights",
     "if (!staged_.is_partial) updates_.clear();", "updates_.clear();"),
    ("an update counts before all have switched", "dispatcher_workers",
     "  if (--collection->num_missing == 0) finish(collection, effects);\n}\n\n"
     "void Dispatcher::on_event(int32_t, StepProgress&",
     "  if (--collection->num_missing <= 1) finish(collection, effects);\n}\n\n"
     "void Dispatcher::on_event(int32_t, StepProgress&"),
    ("who uses other weights goes on", "dispatcher_workers",
     "if (!event.error && collection->weights_hash && event.weights_hash != "
     "collection->weights_hash) {", "if (false) {"),
    ("a replacement's weights are not looked at", "dispatcher_joining",
     "} else if (state.weights_hash != weights_.hash) {", "} else if (false) {"),
    ("who cannot switch goes on", "dispatcher_workers",
     "if (event.error && collection->must_succeed && recovery_.is_on) {", "if (false) {"),
    ("restored requests do not wait for their weights", "dispatcher_restart",
     "if (has_other_weights && !restored.groups.empty()) {", "if (false) {"),
    ("what was acknowledged is made again", "dispatcher_restart",
     "{.is_done = std::move(group.is_done), ", "{"),
    ("an abort takes back what was delivered", "ledger",
     "    if (it->second.must_finish) continue;\n", ""),
    ("what a worker hands back of a delivered batch is taken", "ledger",
     "if (found == entries_.end() || !found->second.must_finish) return std::nullopt;",
     "return std::nullopt;"),
    ("a partial sample is made whole", "dispatcher_restart",
     "      request.response_lengths[static_cast<size_t>(sample)] = num_tokens;\n", ""),
    ("a switch is not written down", "dispatcher_restart",
     "if (log_ != nullptr && !is_on_the_way(version)) log_->switched(version);", ""),
    ("what was withdrawn stays at its bridge", "dispatcher_workers",
     "kept_->decide(worker, event.key, event.attempt, Verdict::kDrop);", "{}"),
    ("what a lost worker left at bridges stays there", "dispatcher_recovery",
     "  if (kept_ != nullptr) kept_->forget(worker);\n", ""),
    ("what is dropped is delivered", "rollout/node_bridge/kept_store",
     "  if (verdict == Verdict::kDrop) {\n    ++num_dropped_;\n    return;\n  }\n", ""),
    ("a verdict that is early is forgotten", "rollout/node_bridge/kept_store",
     "  decided_.insert_or_assign(name, decided);\n", ""),
    ("a bridge that stands still is kept", "rollout/node_bridge/node_desk",
     "        silent.push_back(node.worker);\n", ""),
    ("an acknowledged group is kept", "rollout/journal/live_set",
     "  groups_.erase(found);\n", ""),
    ("half a step is written down", "trainer_bridge/delivery/delivery",
     "  log_->formed(std::move(records));\n",
     "  records.resize(1);\n  log_->formed(std::move(records));\n"),
    ("a batch of before gets another number", "trainer_bridge/delivery/delivery",
     "BatchNotice notice{.batch_seq = batch.record.batch_seq,",
     "BatchNotice notice{.batch_seq = ++last_batch_seq_,"),
]


def _path_of(name: str) -> str:
    return f"{name}.cc" if "/" in name else f"rollout/cluster/{name}.cc"


def _commands() -> list[str]:
    ninja = subprocess.run(["ninja", "-C", BUILD, "-t", "commands", TARGET], check=True,
                           capture_output=True, text=True)
    return ninja.stdout.splitlines()


def _compile(source: pathlib.Path, name: str, into: pathlib.Path) -> None:
    """Compiles `source` as the build compiles the file of that name."""
    [command] = [line for line in _commands() if line.endswith("/" + _path_of(name))]
    words = shlex.split(command)
    words[words.index("-o") + 1] = str(into)
    words[-1] = str(source)
    words[words.index("-MF") + 1] = os.devnull
    subprocess.run(words, cwd=BUILD, check=True)


def _link(mutant: pathlib.Path, into: pathlib.Path) -> None:
    """Links the simulation; what the mutant defines is not taken from the library."""
    [command] = [line for line in _commands() if f"-o {TARGET} " in line]
    command = command.replace(f"-o {TARGET} ", f"-o {into} {mutant} ")
    subprocess.run(["sh", "-c", command], cwd=BUILD, check=True)


@pytest.mark.skipif(os.environ.get("ROLLPACK_FULL") != "1", reason="minutes; ROLLPACK_FULL=1")
@pytest.mark.parametrize(("name", "before", "after"), [mutant[1:] for mutant in MUTANTS],
                         ids=[mutant[0].replace(" ", "-") for mutant in MUTANTS])
def test_the_simulation_notices(name: str, before: str, after: str, tmp_path: pathlib.Path) -> None:
    text = (ROOT / _path_of(name)).read_text()
    assert text.count(before) == 1, "the code has changed: mend the mutant"
    source, mutant, program = tmp_path / "mutant.cc", tmp_path / "mutant.o", tmp_path / "simulation"
    source.write_text(text.replace(before, after))
    _compile(source, name, mutant)
    _link(mutant, program)
    environment = {**os.environ, "ROLLPACK_SEEDS": str(NUM_SEEDS)}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600,
                            check=False)
    assert result.returncode != 0, f"{NUM_SEEDS} seeds, and nothing was noticed"
    print(result.stdout[-400:])


@pytest.mark.parametrize(("name", "before"), [mutant[1:3] for mutant in MUTANTS],
                         ids=[mutant[0].replace(" ", "-") for mutant in MUTANTS])
def test_a_mutant_still_fits_the_code(name: str, before: str) -> None:
    assert (ROOT / _path_of(name)).read_text().count(before) == 1
