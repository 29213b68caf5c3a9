"""The Python client of rollpack: submit prompts, take batches on shared memory, send weights.

with rollpack.launch("configs/quickstart.yaml") as engine:
    engine.submit(prompts)
    with engine.next_batch() as batch:
        loss = train(batch.torch("input_ids"), batch.torch("rollout_log_probs"))
    engine.update_weights(model.state_dict(), version=1)
"""

from rollpack import aio, metrics
from rollpack.batch import Batch, FailedSample, Row
from rollpack.client import Client, connect
from rollpack.columns import Columns, NoSuchColumn
from rollpack.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NonFinite,
    NotFound,
    ResourceExhausted,
    RollpackError,
    Unavailable,
    Unsupported,
    WouldBlock,
    WrongProcess,
)
from rollpack.generation import SamplesFailed
from rollpack.launcher import launch
from rollpack.prompts import Prompt, Sampling, ScoredSequence, ScoreSequence
from rollpack.samples import Sample
from rollpack.sleeping import SleepState
from rollpack.views import LayoutView
from rollpack.weights import WeightVersion

__all__ = [
    "Batch",
    "Client",
    "Columns",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FailedSample",
    "Internal",
    "InvalidArgument",
    "LayoutView",
    "NoSuchColumn",
    "NonFinite",
    "NotFound",
    "Prompt",
    "ResourceExhausted",
    "RollpackError",
    "Row",
    "Sample",
    "SamplesFailed",
    "Sampling",
    "ScoreSequence",
    "ScoredSequence",
    "SleepState",
    "Unavailable",
    "Unsupported",
    "WeightVersion",
    "WouldBlock",
    "WrongProcess",
    "aio",
    "connect",
    "launch",
    "metrics",
]
