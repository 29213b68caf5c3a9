"""Collecting the samples of one request out of the stream of batches."""

from __future__ import annotations

from collections import Counter

from rollpack.batch import Batch, FailedSample
from rollpack.errors import RollpackError
from rollpack.samples import Sample


class SamplesFailed(RollpackError):
    """Some samples of generate() ended in errors; the text is the first one's.

    Attributes:
        failed: those samples, each with its own typed error.
        samples: the samples that finished, in order.
    """

    def __init__(
        self,
        message: str = "",
        *,
        failed: tuple[FailedSample, ...] = (),
        samples: tuple[Sample, ...] = (),
    ) -> None:
        """Hold what failed and what did not."""
        super().__init__(message)
        self.failed = failed
        self.samples = samples


class RequestSamples:
    """The samples of one request, as far as they have come."""

    def __init__(self, request_id: int, num_prompts: int) -> None:
        """Expect one group for each of `num_prompts` prompts."""
        self.request_id = request_id
        self._num_open = num_prompts
        self._num_arrived: Counter[int] = Counter()
        self._samples: list[Sample] = []
        self._failed: list[FailedSample] = []

    @property
    def are_complete(self) -> bool:
        """Whether every prompt has all samples of its group, failed ones included."""
        return self._num_open == 0

    def other_requests(self, batch: Batch) -> set[int]:
        """Requests besides this one that have samples in a batch."""
        ids = {failed.request_id for failed in batch.failed}
        if batch.num_samples:
            ids.update(batch["request_id"].tolist())
        return ids - {self.request_id}

    def add(self, batch: Batch) -> None:
        """Copy this request's samples out of a batch."""
        for sample in batch.samples(copy=True):
            if sample.request_id == self.request_id:
                self._samples.append(sample)
                self._count(sample.prompt_index, sample.group_size)
        for failed in batch.failed:
            if failed.request_id == self.request_id:
                self._failed.append(failed)
                self._count(failed.prompt_index, failed.group_size)

    def _count(self, prompt_index: int, group_size: int) -> None:
        self._num_arrived[prompt_index] += 1
        self._num_open -= self._num_arrived[prompt_index] == group_size

    def result(self) -> list[Sample]:
        """The samples by prompt_index and sample_index.

        Raises:
            SamplesFailed: one or more failed.
        """
        samples = sorted(
            self._samples, key=lambda sample: (sample.prompt_index, sample.sample_index)
        )
        if not self._failed:
            return samples
        first = self._failed[0]
        raise SamplesFailed(
            f"{len(self._failed)} of {len(self._failed) + len(samples)} samples failed; the first, "
            f"sample {first.sample_index} of prompt {first.prompt_id!r}: {first.error}",
            failed=tuple(self._failed),
            samples=tuple(samples),
        )
