"""metrics.jsonl is the record of truth; mirrors go on in the same place, fail without harm and hold no secret."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support.small_run import command, make_data, train
from vlm_train import loggers
from vlm_train.config import origins
from vlm_train.config.compose import compose_config
from vlm_train.config.redact import without_credentials
from vlm_train.contracts.batch import Batch, Problem
from vlm_train.errors import ConfigError
from vlm_train.loggers import metrics_logger, servers
from vlm_train.loggers.jsonl_writer import JsonlWriter
from vlm_train.loggers.metrics_logger import ImageSample, MetricsLogger
from vlm_train.training.bad_samples import BadSamples
from vlm_train.training.module import VLMModule


class Server:
    """A backend that can be away."""

    def __init__(self) -> None:
        self.away = False
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.seen: list[Any] = []
        self.tries = 0

    def connect(self) -> Server:
        self.check()
        return self

    def check(self) -> None:
        self.tries += 1
        if self.away:
            raise ConnectionError("https://user:secret@host refused\nmore")

    def config(self, content: Mapping[str, Any]) -> None:
        self.seen.append(content)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        self.check()
        self.rows.append((step, dict(row)))

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        self.seen.append((step, list(pictures)))

    def pause(self, *, good: bool) -> None:
        self.seen.append(good)


def test_what_a_lost_server_misses_is_sent_when_it_is_back(capsys: pytest.CaptureFixture[str]) -> None:
    server, clock = Server(), SimpleNamespace(now=0.0)
    one = MetricsLogger("wandb", server.connect, clock=lambda: clock.now)
    one.log_metrics({"train/loss": 3.0}, 1)
    server.away = True
    for step in (2, 3):
        one.log_metrics({"train/loss": 2.0}, step)
    assert server.tries == 3  # the second row did not wait for the server
    clock.now = metrics_logger.PAUSE + 1
    one.log_metrics({"train/loss": 1.0}, 4)
    server.away = False
    clock.now *= 3
    one.log_metrics({"train/loss": 0.5}, 5)
    assert [step for step, _ in server.rows] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "logger.wandb: ConnectionError: https://host refused; metrics.jsonl continues",
        "logger.wandb: works again",
    ]


def test_a_slow_failure_is_not_repeated_often() -> None:
    server, clock = Server(), SimpleNamespace(now=0.0)

    def connect() -> Server:
        clock.now += 100  # as a library waits for a server
        raise TimeoutError

    one = MetricsLogger("mlflow", connect, clock=lambda: clock.now)
    for _ in range(100):
        clock.now += 20
        one.log_metrics({"train/loss": 1.0}, 1)
    assert clock.now - 100 * 20 <= 2 * 100 and not server.rows


def test_the_end_of_a_run_is_a_last_try() -> None:
    server = Server()
    server.away = True
    one = MetricsLogger("wandb", server.connect)
    one.log_metrics({"train/loss": 1.0}, 1)
    server.away = False
    one.finalize("failed")
    assert server.rows == [(1, {"train/loss": 1.0})] and server.seen == [False]


def test_a_library_that_is_not_there_stops_the_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow", "mlflow.tracking", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    for factory in (loggers.wandb, loggers.mlflow, loggers.trackio, loggers.tensorboard):
        with pytest.raises(ConfigError, match=r"is not installed: pip install"):
            factory(folder=tmp_path)


def test_other_ranks_mirror_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_logger, "process_rank", lambda: 1)
    server = Server()
    one = MetricsLogger("csv", server.connect)
    one.log_metrics({"train/loss": 1.0}, 1)
    one.finalize("success")
    assert (server.tries, server.rows, server.seen) == (0, [], [])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="limits are a Unix matter")
def test_no_line_is_lost_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file size limit stands for a full disk: the system writes what fits and refuses the rest."""
    import resource

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write_line({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
    try:
        writer.write_line({"step": 2})
        writer.write_line({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("cannot be written" in line for line in said) and '{"step": 3}' in said[1]
    writer.write_line({"step": 4})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_an_unwritable_mirror_does_not_stop_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("metrics.csv", "tensorboard", "predictions"):
        place = tmp_path / "run" / name
        place.mkdir(parents=True) if name == "metrics.csv" else place.touch()
    more = ["logger=[csv,tensorboard,mlflow]", "logger.mlflow.tracking_uri=http://me:secret@127.0.0.1:9"]
    run = train(command(data, tmp_path, *more, "trainer.max_steps=2"))
    assert [row["step"] for row in rows_of(run) if row["split"] == "train"] == [1, 2]
    said = capsys.readouterr().out
    for name in ("csv", "tensorboard", "mlflow"):
        assert said.count(f"logger.{name}: ") == 1, name
    assert "secret" not in said
    assert said.count("callbacks.predictions: none any more") == 1
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def crash(data: Path, runs: Path, *more: str, step: int = 3) -> None:
    """A run that raises after this step."""
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Batch, batch_idx: int) -> Any:
        if self.global_step >= step:
            raise RuntimeError("stopped")
        return inner(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(VLMModule, "training_step", training_step)
        train(command(data, runs, *more))


def test_mirrors_go_on_where_they_were(data: Path, tmp_path: Path) -> None:
    """Crashed after step 3, resumed from step 2: every logger has each step of the record once, or once last."""
    more = ["logger=[csv,tensorboard,mlflow]", "trainer.max_steps=4", "trainer.val_every=4"]
    crash(data, tmp_path, *more)
    run = tmp_path / "run"
    held = json.loads((run / "mlflow.json").read_text())
    assert csv_of(run)[-1]["step"] == "3"
    train(command(data, tmp_path, *more))
    rows, table = rows_of(run), csv_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert [{k: v for k, v in row.items() if v} for row in table] == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    events = tensorboard_of(run).Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows if row["split"] == "train"
    ]
    assert json.loads((run / "mlflow.json").read_text()) == held
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("vlm-train").experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (held["run_id"], "run", "FINISHED")
    assert found.data.params["trainer.max_steps"] == "4"
    points = client.get_metric_history(held["run_id"], "train/loss")
    assert {point.step: point.value for point in points} == {
        row["step"]: row["loss"] for row in rows if row["split"] == "train"
    }
    assert found.data.metrics["val/loss"] == rows[-1]["loss"]
    assert (tmp_path / "mlflow" / held["run_id"] / "artifacts/predictions/step-00000004/0.png").is_file()


def csv_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def tensorboard_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_mlflow_starts_anew_where_its_run_is_gone(tmp_path: Path) -> None:
    first = loggers.mlflow(folder=tmp_path / "run")
    first.log_metrics({"train/loss: a*b": 1.0}, 1)  # a name that MLflow does not take
    path = tmp_path / "run" / "mlflow.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"run_id": "0" * 32}))
    loggers.mlflow(folder=tmp_path / "run").log_metrics({"train/loss": 1.0}, 1)
    assert json.loads(path.read_text())["run_id"] not in (held["run_id"], "0" * 32)


class FakeWandb(ModuleType):
    """What `Wandb` calls of the library."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.arguments: dict[str, Any] = {}
        self.argv: list[str] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.Image = lambda path, caption: (path, caption)

    def init(self, **arguments: Any) -> FakeWandb:
        self.arguments, self.argv = arguments, list(sys.argv)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    errors = ModuleType("wandb.errors")
    errors.AuthenticationError = errors.UsageError = ValueError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return fake


def test_wandb_goes_on_by_its_own_steps(fake_wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-train", "data.train=[{shards: https://me:secret@host/set}]"])
    one = loggers.wandb(folder=tmp_path / "my-run")
    for step in (3, 2):  # a resumed run goes back
        one.log_metrics({"train/loss": 1.0}, step)
    one.log_images(4, [ImageSample(tmp_path / "0.png", "a cat")])
    wanted = {"id": "my-run", "name": "my-run", "resume": "allow", "mode": "offline"}
    assert fake_wandb.arguments.items() >= wanted.items()
    assert fake_wandb.metrics == [("trainer/step", None), ("*", "trainer/step")]
    assert [row["trainer/step"] for row in fake_wandb.logged] == [3, 2, 4]
    assert fake_wandb.logged[-1]["predictions"] == [(str(tmp_path / "0.png"), "a cat")]
    assert fake_wandb.argv[1] == "data.train=[{shards: https://host/set}]" and "secret" in sys.argv[1]


@pytest.mark.parametrize(
    "given, mode", [("", "offline"), ("WANDB_API_KEY", "online"), ("netrc", "online"), ("WANDB_MODE", "disabled")]
)
def test_wandb_is_online_only_with_a_key(
    given: str, mode: str, fake_wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    elif given:
        monkeypatch.setenv(given, "disabled")
    loggers.wandb(folder=tmp_path)
    assert fake_wandb.arguments["mode"] == mode


def test_wandb_online_without_a_key_is_refused_without_asking(fake_wandb: FakeWandb, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logger\.wandb: no API key.*wandb login.*mode=offline"):
        loggers.wandb(folder=tmp_path, mode="online")
    assert not fake_wandb.arguments


def test_trackio_goes_on_in_the_run_of_this_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = ModuleType("trackio")
    log: Callable[..., None] = lambda row, step: calls.append((step, row))  # noqa: E731
    run = SimpleNamespace(config={}, log=log)
    fake.init = lambda project, **named: calls.append((project, named)) or run  # type: ignore[attr-defined,func-returns-value]
    fake.Image = lambda path, caption: caption  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    one = loggers.trackio(folder=tmp_path / "my-run")
    one.log_hyperparams({"optim": {"lr": "${lr}"}})
    one.log_metrics({"train/loss": 1.0}, 7)
    one.log_images(8, [ImageSample(tmp_path / "0.png", "a cat")])
    settings = {"name": "my-run", "space_id": None, "resume": "allow", "embed": False}
    assert calls == [("vlm-train", settings), (7, {"train/loss": 1.0}), (8, {"predictions/0": "a cat"})]
    assert run.config == {"optim.lr": "${lr}"}


def test_addresses_lose_their_user() -> None:
    given = {
        "shards": ["s3://key:pa$$@bucket/a", "https://token@host:8080/x?y=a@b", "/data/a@b", 3],
        "uri": "postgresql+psycopg2://u:p@db/mlflow",
    }
    assert without_credentials(given) == {
        "shards": ["s3://bucket/a", "https://host:8080/x?y=a@b", "/data/a@b", 3],
        "uri": "postgresql+psycopg2://db/mlflow",
    }


def test_no_password_in_what_is_shown_and_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://me:secret@host/set"
    server = Server()
    MetricsLogger("wandb", server.connect).log_hyperparams({"data": {"train": [{"shards": address}]}})
    assert server.seen == [{"data": {"train": [{"shards": "https://host/set"}]}}]
    overrides = ["size=tiny", f"data.train=[{{shards: '{address}'}}]"]
    shown = origins.format_origins(compose_config(overrides), origins.find_origins(overrides))
    assert "https://host/set" in shown and "secret" not in shown
    bad = BadSamples(tmp_path, max_in_a_row=9, max_share=1.0, strict=False)
    for _ in range(2):
        bad.record_problems("train", 1, [Problem(f"{address}/0.tar: no", "read", f"{address}/0.tar", "k")], 0)
    written = (tmp_path / "quarantine-0.jsonl").read_text()
    assert written.count("https://host/set/0.tar") == 2 and "secret" not in written + capsys.readouterr().out


def test_no_secret_reaches_the_disk(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that the configuration names, a key of a logger, and a password in a logger's address."""
    pytest.importorskip("wandb")
    canaries = {"SECRET_CANARY": "canary-7f3a9c", "WANDB_API_KEY": "0" * 20 + "canary51e0" + "0" * 10}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    more = ["logger=[csv,tensorboard,wandb,mlflow]", "logger.wandb.mode=offline", "trainer.max_steps=2"]
    more += ["data.cache=${oc.env:SECRET_CANARY}", "logger.wandb.tags=[quick]", f"logger.mlflow.tracking_uri={uri}"]
    monkeypatch.setattr(sys, "argv", ["vlm-train", *more])
    run = train(command(data, tmp_path / "runs", *more, "trainer.val_every=2"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.csv", "mlflow.json", "config.yaml", "report.html", "mlflow.db", "step-00000002.json"} <= {
        path.name for path in files
    }
    assert any(path.name.endswith(".wandb") for path in files) and any("events." in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in canaries.items() if value.encode() in content], path
    assert OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))["data"]["cache"] == "${oc.env:SECRET_CANARY}"  # type: ignore[call-overload,index]
    assert servers.wandb_key()
